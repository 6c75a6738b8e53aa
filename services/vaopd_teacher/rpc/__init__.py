"""The edge of the teacher: bytes in, bytes out."""
