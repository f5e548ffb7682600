# A server of one run:  docker build -t unolora . && docker run -p 8000:8000 -v ./runs/quickstart:/srv/run:ro -v ./keys:/keys:ro unolora
FROM python:3.11-slim

# The CPU build; for a GPU give another index, e.g. --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --index-url ${TORCH_INDEX} torch==2.13.0

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir '.[serve]' \
 && useradd --create-home unolora && install -d -o unolora -g unolora /home/unolora/.cache
USER unolora
WORKDIR /home/unolora

EXPOSE 8000
HEALTHCHECK --start-period=120s --interval=10s --timeout=5s \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
# SIGTERM, which `docker stop` sends, answers what was accepted before it stops: give it time (--stop-timeout 70).
ENTRYPOINT ["unolora", "serve"]
CMD ["/srv/run", "--host", "0.0.0.0", "--keys", "/keys"]
