# Everything but the policies: simulator, training, judging, analysis.
# Written by cloud/images.py.
FROM python:3.11-slim
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /opt/rehearsal/constraints.txt
RUN python -m pip install --no-cache-dir --disable-pip-version-check -c /opt/rehearsal/constraints.txt \
    'av==18.1.0' \
    'diffusers==0.42.1' \
    'docutils==0.22.4' \
    'einops==0.8.2' \
    'google-crc32c==1.9.0' \
    'gymnasium==1.4.0' \
    'imageio==2.38.1' \
    'ipykernel==7.4.0' \
    'itables==2.9.1' \
    'matplotlib==3.11.2' \
    'msgpack==1.2.4' \
    'mujoco==4.0.0' \
    'nbconvert==7.17.2' \
    'numpy==2.4.6' \
    'openai==3.52.0' \
    'pandas==3.1.1' \
    'papermill==2.7.0' \
    'pillow==13.0.0' \
    'pyarrow==26.0.1' \
    'PyYAML==6.0.3' \
    'requests==2.34.2' \
    'safetensors==0.8.0' \
    'scipy==1.17.1' \
    'seaborn==0.13.2' \
    'snakemake-storage-plugin-s3==0.3.6' \
    'snakemake[reports]==9.27.1' \
    'tensorboard==2.21.0' \
    'tensorflow-datasets==4.9.10' \
    'torch==2.13.0' \
    'websockets==17.4'
RUN useradd --uid 1000 --create-home rehearsal && chmod 1777 /home/rehearsal && install -d -m 1777 /work
COPY Snakefile /opt/rehearsal/Snakefile
COPY rules /opt/rehearsal/rules
COPY config /opt/rehearsal/config
COPY envs /opt/rehearsal/envs
COPY notebooks /opt/rehearsal/notebooks
COPY profiles /opt/rehearsal/profiles
COPY slurm /opt/rehearsal/slurm
COPY benchmarks/throughput.yaml /opt/rehearsal/benchmarks/throughput.yaml
COPY workflow_src /opt/rehearsal/workflow_src
ENV PYTHONPATH=/opt/rehearsal PYTHONUNBUFFERED=1 HOME=/home/rehearsal USER=rehearsal
USER 1000
WORKDIR /work
ENTRYPOINT ["python", "-m", "workflow_src.launch"]
