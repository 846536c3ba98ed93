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

{{/* A pod that talks to Kubeflow's API server. Usage: include "k2.platformPod" (list $ "name" (list "k2" "pipeline" "upload")) */}}
{{- define "k2.platformPod" -}}
{{- $ := index . 0 -}}
metadata:
  labels:
    app.kubernetes.io/name: k2
    app.kubernetes.io/component: platform
    app.kubernetes.io/part-of: k2
    sidecar.istio.io/inject: "false"
spec:
  serviceAccountName: k2-platform
  automountServiceAccountToken: false
  enableServiceLinks: false
  restartPolicy: Never
  priorityClassName: k2-platform
  securityContext:
    {{- include "k2.podSecurity" $ | nindent 4 }}
  containers:
    - name: {{ index . 1 }}
      image: {{ include "k2.image" (list $ "cpu") }}
      command: {{ index . 2 | toJson }}
      env:
        - {name: K2_DEPLOYMENT, value: /etc/k2/deployment.yaml}
        - {name: KF_PIPELINES_SA_TOKEN_PATH, value: /var/run/secrets/kubeflow/pipelines/token}
        - {name: HOME, value: /tmp}
        - {name: K2_HOME, value: /tmp/k2}
      {{- if has (index . 1) (list "schedule" "submit") }}
      # One apply at a time, by a lease in the object store; and what runs have cost is there.
      envFrom:
        - secretRef: {name: {{ $.Values.store.secret }}}
      {{- end }}
      resources:
        requests: {cpu: 100m, memory: 512Mi, ephemeral-storage: 64Mi}
        limits: {memory: 512Mi, ephemeral-storage: 256Mi}
      securityContext:
        {{- include "k2.containerSecurity" $ | nindent 8 }}
      volumeMounts:
        - {name: deployment, mountPath: /etc/k2, readOnly: true}
        - {name: token, mountPath: /var/run/secrets/kubeflow/pipelines, readOnly: true}
        - {name: tmp, mountPath: /tmp}
  volumes:
    - name: deployment
      configMap: {name: k2-deployment}
    # Kubeflow's API server accepts this token and no other; the kubelet renews it.
    - name: token
      projected:
        sources:
          - serviceAccountToken: {audience: pipelines.kubeflow.org, expirationSeconds: 3600, path: token}
    - name: tmp
      emptyDir: {sizeLimit: 256Mi}
{{- end }}
