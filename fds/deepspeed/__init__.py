"""The front door for programs that were written for DeepSpeed: a ds_config in, a printed chain and an engine out."""
