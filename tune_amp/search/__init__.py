"""A search: Optuna suggests, Ray Tune schedules, the recorder keeps every report, and an interrupted search resumes."""
