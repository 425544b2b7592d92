"""The foreign dialects: config fields and tensor names of one kind of checkpoint a file, into ours."""
