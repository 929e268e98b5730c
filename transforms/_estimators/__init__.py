"""What estimates the mean and the variance of each gradient coordinate: one file per estimator, and what they share."""
