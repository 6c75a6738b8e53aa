"""The teacher service: prompt groups arrive over gRPC, their scores leave. See `server.py` for how its parts fit."""
