"""What stands between the socket and the routes: who may enter, how much, how slowly, and until when."""
