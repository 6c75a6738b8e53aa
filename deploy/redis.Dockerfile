# Valkey with a folder for its append-only file that the account of the other images may write.
FROM docker.io/valkey/valkey:8-bookworm
RUN install -d -o 10001 -g 10001 /queue
WORKDIR /queue
USER 10001:10001
