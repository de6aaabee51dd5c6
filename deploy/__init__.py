"""Running the exported engines: sessions per backend, step switching, pipelines. Nothing is here yet."""
