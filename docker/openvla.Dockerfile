# OpenVLA, from its requirements-min.txt. transformers 4.50 and later ignore the image (openvla#346).
# Written by cloud/images.py.
FROM python:3.10-slim
RUN python -m pip install --no-cache-dir --disable-pip-version-check \
    'accelerate==0.30.1' \
    'bitsandbytes==0.43.1' \
    'numpy==1.26.4' \
    'pillow==11.0.0' \
    'sentencepiece==0.1.99' \
    'timm==0.9.10' \
    'tokenizers==0.19.1' \
    'torch==2.2.0' \
    'torchvision==0.17.0' \
    'transformers==4.40.1' \
    'msgpack==1.1.0' \
    'PyYAML==6.0.2' \
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
