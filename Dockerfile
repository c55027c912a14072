# Fledge on a CPU. The default command is the quickstart, on what the repository ships; its results lie in the volume.
#     docker build --tag fledge .
#     docker run --rm --volume fledge-runs:/home/fledge/runs fledge
#     docker run --rm --interactive --tty --volume fledge-runs:/home/fledge/runs fledge \
#         python generate.py --model runs/quickstart/model --interactive
FROM python:3.12-slim

RUN useradd --uid 1000 --create-home fledge
WORKDIR /home/fledge
COPY --chown=fledge . .
# torch without CUDA is a tenth of the size.
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
        --constraint constraints.txt --editable '.[eval]' \
    && mkdir --parents runs \
    && chown fledge runs .

USER 1000
# hadolint takes a name with TOKEN in it for a secret.
# hadolint ignore=DL3064
ENV HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
VOLUME /home/fledge/runs
CMD ["bash", "recipes/run.sh", "quickstart"]
