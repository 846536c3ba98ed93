"""Object storage: client, immutable artifacts, work in progress behind leases, aliases."""
