"""Who may use a shared service: API keys, quotas, certificates for development."""
