# One image for every role: Ray head, Ray worker, MLflow server, `descent` itself.
#
#   docker build --build-arg VARIANT=cpu --build-arg TORCH_INDEX=URL -t descent-service:0.1.0 .
#
# VARIANT      cpu or cuda. The build fails if the torch that was installed is not of that kind.
# TORCH_INDEX  the package index that torch alone comes from; empty means pip's own default.
#              On x86-64 the default index serves the CUDA build, so VARIANT=cpu needs PyTorch's
#              index of CPU wheels here; deploy/README.md says where its address is documented.

# Written out, not `3.11-slim`: a base that moves would change what the lock is tested on.
FROM python:3.11.16-slim-trixie AS base
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore


# Descent's own wheel. The build backend stays in this stage.
FROM base AS wheel
WORKDIR /source
COPY requirements.lock ./
RUN pip install --constraint requirements.lock hatchling
COPY pyproject.toml README.md LICENSE ./
COPY configs ./configs
COPY service ./service
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .


# The lock is a constraint rather than a list to install: the image then holds what Descent
# needs, at the versions that were tested, without the tests' own tools.
FROM base AS packages
ARG VARIANT=cpu
ARG TORCH_INDEX=
WORKDIR /source
COPY requirements.lock ./
# torch comes first and alone: the wrong kind is noticed before its gigabytes of companions
# are fetched, and a change in the sources leaves this layer alone.
RUN pip install --no-deps --constraint requirements.lock \
      ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} torch \
    && python -c "import runpy, sys, sysconfig; \
cuda = runpy.run_path(sysconfig.get_path('purelib') + '/torch/version.py')['cuda']; \
kind = 'cuda' if cuda else 'cpu'; \
sys.exit(None if kind == '${VARIANT}' else \
f'VARIANT=${VARIANT}, but the torch that was installed is for {kind}: set TORCH_INDEX')"
COPY --from=wheel /wheels /wheels
RUN pip install --constraint requirements.lock "$(echo /wheels/*.whl)[postgres]"


FROM base AS final
# torch.compile hands its kernels to a C++ compiler when it first runs them.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 descent \
    && useradd --uid 10001 --gid 10001 --create-home descent \
    && install --directory --owner=10001 --group=10001 /runs
# Into /usr/local itself, not a virtual environment: whichever shell an operator starts ray
# with (KubeRay can use a login shell, which resets PATH), it finds `ray` and `descent`.
COPY --from=packages /usr/local /usr/local
# RAY_AUTH_MODE on purpose: with it unset, Ray decides by whether a token file happens to lie
# about, and a head without one lets anybody on its network run code.
ENV PYTHONUNBUFFERED=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_AUTH_MODE=token
# As a number, so that Kubernetes can tell for itself that this is not root.
USER 10001:10001
WORKDIR /home/descent
# No health check and no ENTRYPOINT: `ray`, `mlflow` and `descent` all run in here, and what
# is healthy differs; deploy/ says it for each.
HEALTHCHECK NONE
CMD ["descent", "--help"]
