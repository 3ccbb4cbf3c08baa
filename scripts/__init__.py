"""The command line of fewstep, and the scripts that made what ships."""
