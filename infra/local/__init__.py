"""The embedded profile: bus, store, sandboxes, gateway and ticker on one machine."""
