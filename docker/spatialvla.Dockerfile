# SpatialVLA, from its requirements.txt. transformers 4.51 lacks what its code imports (SpatialVLA#40).
# Written by cloud/images.py.
FROM python:3.10-slim
RUN python -m pip install --no-cache-dir --disable-pip-version-check \
    'accelerate==1.0.1' \
    'bitsandbytes==0.45.0' \
    'einops==0.8.0' \
    'numpy==1.26.4' \
    'pillow==11.0.0' \
    'scipy==1.14.1' \
    'sentencepiece==0.2.0' \
    'tokenizers==0.21.0' \
    'torch==2.5.1' \
    'torchvision==0.20.1' \
    'transformers==4.47.0' \
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
