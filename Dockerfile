# Worker and producer in one image; the command says which: `worker` (default) or `producer submit ...`.
ARG BASE=python:3.13-slim

FROM ${BASE} AS dependencies
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN ["python", "-m", "venv", "/opt/venv"]
COPY requirements.txt /tmp/requirements.txt
# Wheels alone: the image has no compiler, and a wheel runs no code of its package while it is installed.
RUN ["/opt/venv/bin/python", "-m", "pip", "install", "--require-hashes", "--only-binary=:all:", "-r", "/tmp/requirements.txt"]
# The image never installs anything again.
RUN ["/opt/venv/bin/python", "-m", "pip", "uninstall", "--yes", "pip"]

FROM ${BASE}
LABEL org.opencontainers.image.title="millstream" org.opencontainers.image.licenses="MIT"
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
RUN ["useradd", "--uid", "10001", "--user-group", "--no-create-home", "--home-dir", "/nonexistent", "--shell", "/usr/sbin/nologin", "millstream"]
COPY --from=dependencies /opt/venv /opt/venv
WORKDIR /app
COPY LICENSE ./
COPY millstream ./millstream
COPY worker ./worker
COPY producer ./producer
# Compiled here, since the container's file system is read-only; it costs a start half a second otherwise.
RUN ["python", "-m", "compileall", "-q", "/app"]
USER 10001:10001
# A worker told to stop finishes what it streams within MILLSTREAM_GRACE and hands the rest over.
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m"]
CMD ["worker"]
