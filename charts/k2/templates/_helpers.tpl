{{/* Labels of every object. */}}
{{- define "k2.labels" -}}
app.kubernetes.io/name: k2
app.kubernetes.io/part-of: k2
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- range $name, $value := .Values.labels }}
k2.dev/{{ $name }}: {{ $value | quote }}
{{- end }}
{{- end }}

{{/* An image by digest. Usage: include "k2.image" (list $ "cpu") */}}
{{- define "k2.image" -}}
{{- $values := (index . 0).Values -}}
{{ $values.registry }}/{{ index . 1 }}@{{ required (printf "images.%s: the digest of the image you built" (index . 1)) (index $values.images (index . 1)) }}
{{- end }}

{{- define "k2.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "k2.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Everywhere in this block but link-local addresses, where clouds hand out a node's credentials. */}}
{{- define "k2.block" -}}
{cidr: {{ . }}{{ if eq . "0.0.0.0/0" }}, except: [169.254.0.0/16]{{ end }}}
{{- end }}
