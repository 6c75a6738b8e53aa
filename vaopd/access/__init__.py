"""Access to a shared service: API keys, quotas, certificates for development."""
