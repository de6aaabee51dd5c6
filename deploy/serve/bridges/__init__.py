"""Under the servers of others: what runs in NVIDIA's Triton and Dynamo and on a Ray cluster."""
