# fedcollm in a container. For NVIDIA GPUs: docker build -t fedcollm .
# For the CPU: docker build --build-arg TORCH_INDEX=ADDRESS -t fedcollm:cpu . with that of PyTorch's builds for the CPU.
# docs/how-to/install.md says how to run it.

# Any image with Python 3.11 or newer and its venv module. With 3.11 constraints.txt was tested.
ARG BASE=python:3.11-slim

FROM ${BASE} AS built
# Where pip also looks for torch. Without it pip takes the usual builds, which bring CUDA on x86-64.
ARG TORCH_INDEX=
# Extras of pyproject.toml, with commas: dp,s3
ARG EXTRAS=
COPY pyproject.toml README.md LICENSE constraints.txt /source/
COPY fedcollm_cli /source/fedcollm_cli
COPY stages /source/stages
COPY workspace_template /source/workspace_template
RUN python3 -m venv /opt/fedcollm \
    && /opt/fedcollm/bin/pip install --no-cache-dir --constraint /source/constraints.txt \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "/source${EXTRAS:+[$EXTRAS]}"

FROM ${BASE}
COPY --from=built /opt/fedcollm /opt/fedcollm
# Whoever it is run as can write there: models of the hub, and what libraries keep.
RUN useradd --uid 1000 --user-group --no-create-home fedcollm && mkdir /cache /workspace && chmod 1777 /cache /workspace
ENV PATH=/opt/fedcollm/bin:$PATH HOME=/cache USER=fedcollm HF_HOME=/cache/huggingface
USER fedcollm
VOLUME /cache
WORKDIR /workspace
ENTRYPOINT ["fedcollm"]
CMD ["--help"]
