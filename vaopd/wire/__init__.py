"""Types and errors to protobuf and back, one file for each .proto. Importing one file doesn't load the others."""
