"""Many engines as one: who is there (etcd), which instance a request goes to, and what follows when one is lost."""
