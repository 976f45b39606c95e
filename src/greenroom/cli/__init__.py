"""The command line. Modules of commands are imported when their command runs, so that ``--help`` is quick."""
