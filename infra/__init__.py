"""Where it runs: settings, wiring, adapters, the embedded stack and the command `pigeon`."""
