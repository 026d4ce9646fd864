"""The producer's room: the command line that asks for jobs, follows them and reads their answers."""
