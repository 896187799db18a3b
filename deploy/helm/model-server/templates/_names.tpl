{{- define "model-server.selector" -}}
app.kubernetes.io/name: {{ .Release.Name }}
{{- end -}}

{{- define "model-server.labels" -}}
{{ include "model-server.selector" . }}
app.kubernetes.io/part-of: fedclaw
{{- end -}}

{{- define "model-server.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}{{ $image.repository }}@{{ $image.digest }}
{{- else -}}{{ $image.repository }}:{{ $image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "model-server.several" -}}
{{- if gt (int .Values.replicaCount) 1 -}}yes{{- end -}}
{{- end -}}
