"""The libraries that fds is measured against; each module has a `build(job)`, run in an environment that may lack fds."""
