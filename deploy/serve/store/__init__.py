"""What a server keeps: jobs in a database, clips and pictures in a folder or an object store."""
