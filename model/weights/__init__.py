"""Weight files of any format as one stream of (our name, tensor): see checkpoint.py."""
