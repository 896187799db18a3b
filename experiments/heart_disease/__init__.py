"""UCI Heart Disease over its four hospitals, by FLamby's protocol: the experiment behind docs/heart_disease.md."""
