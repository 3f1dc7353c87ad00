"""What a study's cells say: correlations, regret, and how good forecasts are beside the metrics of others."""
