"""`vaopd up`: starts the processes of a run on one host, and ends them together."""
