# RT-1-X in JAX. Its code is no package: clone github.com/google-deepmind/open_x_embodiment and name its folder models.
# Written by cloud/images.py.
FROM python:3.10-slim
RUN python -m pip install --no-cache-dir --disable-pip-version-check \
    'absl-py==2.1.0' \
    'flax==0.8.5' \
    'jax==0.4.30' \
    'jaxlib==0.4.30' \
    'numpy==1.26.4' \
    'orbax-checkpoint==0.5.23' \
    'pillow==11.0.0' \
    'scipy==1.12.0' \
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
