{{/*
Names and labels. The base of every name is the release's own name, so two releases never share an object. It is cut to
40 characters (with a hash, so that two long names stay two): KubeRay shortens what it derives from the cluster's name
beyond 50, and `<base>-exporter` has to stay a DNS label.
*/}}
{{- define "lepton-ray.base" -}}
{{- if gt (len .Release.Name) 40 -}}
{{- printf "%s-%s" (trunc 31 .Release.Name | trimSuffix "-") (sha256sum .Release.Name | trunc 8) -}}
{{- else -}}
{{- .Release.Name -}}
{{- end -}}
{{- end }}

{{- define "lepton-ray.selector" -}}
app.kubernetes.io/instance: {{ include "lepton-ray.base" . }}
app.kubernetes.io/part-of: lepton-ray
{{- end }}

{{- define "lepton-ray.labels" -}}
{{ include "lepton-ray.selector" . }}
app.kubernetes.io/name: lepton-ray
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* The Secret with Ray's token: the user's own or the one made by this chart. */}}
{{- define "lepton-ray.tokenSecret" -}}
{{- .Values.auth.existingSecret | default (printf "%s-token" (include "lepton-ray.base" .)) -}}
{{- end }}

{{- define "lepton-ray.image" -}}
{{- .Values.image.repository -}}:{{- .Values.image.tag -}}
{{- with .Values.image.digest }}@{{ . }}{{ end -}}
{{- end }}
