"""ROIAlign over all levels of a pyramid."""
