{{/*
What every pod of the chart has in common. It passes the `restricted` Pod Security Standard. fsGroup lets uid 10001 read
mounted Secrets and write to a mounted claim.
*/}}
{{- define "lepton-ray.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "lepton-ray.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Requests equal to limits: memory is not overcommitted, and Ray counts what the kubelet grants. */}}
{{- define "lepton-ray.resources" -}}
requests: {{- toYaml . | nindent 2 }}
limits: {{- toYaml . | nindent 2 }}
{{- end }}

{{/* The store, as environment: LEPTON_STORE and the S3 client's settings, and the credentials from the user's Secret. */}}
{{- define "lepton-ray.storeEnvFrom" -}}
- configMapRef:
    name: {{ include "lepton-ray.base" . }}-settings
{{- with .Values.storage.existingSecret }}
- secretRef:
    name: {{ . }}
{{- end }}
{{- end }}

{{/* Where the store is a shared volume: the claim, and its mount at the path of storage.uri. */}}
{{- define "lepton-ray.storeVolume" -}}
- name: store
  persistentVolumeClaim:
    claimName: {{ .Values.storage.existingClaim }}
{{- end }}

{{- define "lepton-ray.storeMount" -}}
- name: store
  mountPath: {{ trimPrefix "file://" .Values.storage.uri | trimSuffix "/" }}
{{- end }}

{{/* The root file system is read-only; these two are what a process may write to. */}}
{{- define "lepton-ray.scratchMounts" -}}
- name: tmp
  mountPath: /tmp
- name: home
  mountPath: /home/lepton
{{- end }}

{{- define "lepton-ray.podCommon" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext: {{- include "lepton-ray.podSecurityContext" . | nindent 2 }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "lepton-ray.scrapeAnnotations" -}}
prometheus.io/scrape: "true"
prometheus.io/path: /metrics
prometheus.io/port: {{ . | quote }}
{{- end }}

{{/* What a scrape may bring at most; Prometheus' own defaults are no limits. */}}
{{- define "lepton-ray.scrapeLimits" -}}
{{- with .Values.metrics.serviceMonitor -}}
sampleLimit: {{ .sampleLimit }}
labelLimit: {{ .labelLimit }}
labelValueLengthLimit: {{ .labelValueLengthLimit }}
bodySizeLimit: {{ .bodySizeLimit }}
{{- end }}
{{- end }}
