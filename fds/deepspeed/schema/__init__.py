"""The sections of a ds_config, with every key's default and what fds does with it."""
