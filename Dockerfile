# An image for NVIDIA GPUs: docker build -t trlx . (docs/launching.md has the commands that run it)
# The wheels of torch bring CUDA with them, so the machine needs a driver and the NVIDIA container toolkit, the image neither.
FROM python:3.12-slim-bookworm

# git names the revision of a run; torch.compile and DeepSpeed compile with g++
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/*

# before the sources, so that a change of these does not install everything again
COPY requirements.txt /opt/trlx/
RUN pip install --no-cache-dir -r /opt/trlx/requirements.txt

COPY . /opt/trlx
RUN pip install --no-cache-dir -e "/opt/trlx[wandb,tensorboard,report,peft,bnb,data,math,nemo]"

ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HF_HOME=/cache/huggingface

# runs write below the current folder: mount yours there
WORKDIR /work
CMD ["trlx", "--help"]
