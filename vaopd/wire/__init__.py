"""Types and errors to protobuf and back, one file for each .proto. Imports nothing by itself."""
