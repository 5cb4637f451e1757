"""A study: encoder x decoder x fold x seed, trained and scored as processes of their own, and put into one table."""
