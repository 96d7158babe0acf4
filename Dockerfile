# One image for local work, Jupyter and AWS Batch; docs/docker.md shows it in use. It needs BuildKit:
# Docker 23 or newer, with its buildx plugin.
#
#   docker build --tag refrag_lightning:cpu .
#   docker build --tag refrag_lightning:cuda --build-arg VARIANT=cuda .
#
# The base is a tag of a version, which moves when its security is mended, so that a rebuild brings
# that. Where the base has to stay the same, put its digest behind the tag (`@sha256:...`; `docker
# buildx imagetools inspect python:3.11-slim-bookworm` prints it), and renew it by hand.
#
# checkov:skip=CKV_DOCKER_2:The container is one command that ends, not a service; its exit code says how it went.
FROM python:3.11-slim-bookworm

LABEL org.opencontainers.image.title="refrag_lightning" \
      org.opencontainers.image.description="Retrieval-augmented generation with documents as vectors" \
      org.opencontainers.image.licenses="Apache-2.0"

# The container may run under any user id (scripts/run_docker.py takes the caller's, so that files
# in mounts are the caller's), which has no home and no name of its own: the folders below are open
# to all, as /tmp is. HF_HOME and REFRAG_CACHE are the places to mount model caches at.
# NVIDIA's runtime hands a container what the last variable names; nothing happens without it.
ENV HOME=/home/refrag \
    USER=refrag \
    HF_HOME=/cache/huggingface \
    REFRAG_CACHE=/cache/refrag_lightning \
    PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --uid 1000 --create-home --home-dir "${HOME}" refrag \
    && install -d -m 1777 "${HOME}" /cache "${HF_HOME}" "${REFRAG_CACHE}" \
    && install -d -o refrag -g refrag /workspace /workspace/refrag_lightning
WORKDIR /workspace

# torch is by far the largest part, and has a layer to itself. On the package index the Linux wheel
# is the CUDA build, whose CUDA libraries come as wheels too: no CUDA base image is needed, and it
# runs on CPUs. PyTorch keeps the small CPU build in an index of its own; the selector on its site
# names the address, and nothing else is taken from there.
ARG VARIANT=cpu
ARG TORCH_INDEX_URL=
COPY --chown=refrag:refrag constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    case "${VARIANT}" in \
        cpu) if [ -n "${TORCH_INDEX_URL}" ]; then \
                pip install --no-deps --index-url "${TORCH_INDEX_URL}" -c constraints.txt torch; \
            else \
                echo "no TORCH_INDEX_URL: torch is the package index's build, of several GB"; \
                pip install -c constraints.txt torch; \
            fi ;; \
        cuda) pip install -c constraints.txt torch ;; \
        *) echo "VARIANT has to be cpu or cuda, not '${VARIANT}'" >&2; exit 1 ;; \
    esac

# What the package needs, with no more of it than its version: an edit of the code leaves these
# layers as they are. Installed editable, so that a checkout over /workspace is what runs.
ARG EXTRAS=wandb,aws
COPY --chown=refrag:refrag setup.cfg pyproject.toml LICENSE ./
COPY --chown=refrag:refrag refrag_lightning/__init__.py refrag_lightning/
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt -e ".[${EXTRAS}]"

ARG JUPYTER=false
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ "${JUPYTER}" = true ]; then pip install -c constraints.txt "jupyterlab>=4.4,<5"; fi

COPY --chown=refrag:refrag README.md ./
COPY --chown=refrag:refrag scripts scripts
COPY --chown=refrag:refrag configs configs
COPY --chown=refrag:refrag refrag_lightning refrag_lightning

# refrag, by number: a host that forbids root can tell that this is not root.
USER 1000:1000
RUN python -m refrag_lightning --help

# Fetches the checkout that a Batch job names, if one does, and becomes `python -m refrag_lightning`.
ENTRYPOINT ["python", "-m", "refrag_lightning.launch.bootstrap"]
CMD ["--help"]
