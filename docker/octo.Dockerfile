# Octo 1.5, from its requirements.txt, with what that leaves open pinned: jaxlib (octo#125), scipy (octo#71).
# Written by cloud/images.py.
FROM python:3.10-slim
RUN apt-get update && apt-get install --yes --no-install-recommends git && rm -rf /var/lib/apt/lists/*
RUN python -m pip install --no-cache-dir --disable-pip-version-check \
    'chex==0.1.85' \
    'distrax==0.1.5' \
    'einops==0.6.1' \
    'dlimp @ git+https://github.com/kvablack/dlimp@5edaa4691567873d495633f2708982b42edf1972' \
    'flax==0.7.5' \
    'gym==0.26.2' \
    'huggingface-hub==0.17.3' \
    'jax==0.4.20' \
    'jaxlib==0.4.20' \
    'ml-collections==0.1.1' \
    'ml-dtypes==0.2.0' \
    'numpy==1.24.3' \
    'octo @ git+https://github.com/octo-models/octo@241fb3514b7c40957a86d869fecb7c7fc353f540' \
    'optax==0.1.5' \
    'orbax-checkpoint==0.4.4' \
    'pillow==11.0.0' \
    'scipy==1.11.4' \
    'tensorflow==2.15.0' \
    'tensorflow-datasets==4.9.2' \
    'tensorflow-graphics==2021.12.3' \
    'tensorflow-hub==0.16.1' \
    'tensorflow-probability==0.23.0' \
    'tensorflow-text==2.15.0' \
    'transformers==4.34.1' \
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
