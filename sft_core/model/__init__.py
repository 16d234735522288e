"""The policy: loading, adapters, sharding, optimizer, checkpoints, export, and the memory it will take."""
