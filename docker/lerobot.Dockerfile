# LeRobot 0.4.4, the last release for Python 3.11: ACT, Diffusion Policy, SmolVLA; pi0 needs a fork of transformers.
# Written by cloud/images.py.
FROM python:3.11-slim
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN python -m pip install --no-cache-dir --disable-pip-version-check \
    'diffusers==0.35.2' \
    'lerobot[smolvla]==0.4.4' \
    'msgpack==1.1.0' \
    'numpy==2.2.6' \
    'pillow==11.0.0' \
    'PyYAML==6.0.2' \
    'torch==2.10.0' \
    'torchvision==0.25.0' \
    'websockets==15.0.1'
RUN useradd --uid 1000 --create-home rehearsal && chmod 1777 /home/rehearsal && install -d -m 1777 /work
COPY workflow_src/__init__.py /opt/rehearsal/workflow_src/__init__.py
COPY workflow_src/embodiments.py /opt/rehearsal/workflow_src/embodiments.py
COPY workflow_src/common /opt/rehearsal/workflow_src/common
COPY workflow_src/policies /opt/rehearsal/workflow_src/policies
ENV PYTHONPATH=/opt/rehearsal PYTHONUNBUFFERED=1 HOME=/home/rehearsal USER=rehearsal
USER 1000
WORKDIR /work
ENTRYPOINT ["python", "-m", "workflow_src.policies.serve"]
