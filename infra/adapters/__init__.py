"""The cloud behind the ports: one module a technology. Nothing else imports the cloud's client libraries."""
