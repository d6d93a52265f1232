"""Ray: a private or joined session, a trial's share of the machine, its worker, and the cause of a worker's death."""
