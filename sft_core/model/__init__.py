"""The policy: loading, adapters, sharding, optimizer, checkpoints, export, and its planned memory."""
