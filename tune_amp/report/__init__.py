"""One HTML file with pictures, made from a run's Parquet files alone."""
