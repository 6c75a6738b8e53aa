"""From a request to prompt groups that are ready for the device."""
