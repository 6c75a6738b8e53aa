# Prometheus with a folder for its data that the account of the other images may write.
FROM docker.io/prom/prometheus:v3.5.0
USER root
RUN mkdir /data && chown 10001:10001 /data
USER 10001:10001
