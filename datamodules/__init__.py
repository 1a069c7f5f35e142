"""Real data, split over devices."""
